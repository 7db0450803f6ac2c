"""`fastrecv listen` and `fastrecv connect` without their command line: who asks learns which socket has answered."""
