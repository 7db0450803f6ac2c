"""The `fastrecv` command: nouns read, verbs change."""
