"""fastrecv: a Linux receive front end for Python."""
