"""Past one machine: hosts behind a router with ECMP, a message engine behind the hosts, and an account of every record.

What is shown: that no record is lost which a host has acknowledged, whatever is killed, and how exporters move.
"""
