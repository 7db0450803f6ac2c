"""Receivers behind the interfaces that services are written against already: one module for each of them."""
