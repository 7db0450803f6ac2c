"""fastrecv.collector: a flow collector, NetFlow v5, NetFlow v9 and IPFIX to Arrow, Parquet and JSON.

`fastrecv collect` runs it in supervised workers. Its parts may be used by themselves: decoder.Decoder makes record
batches of batches of datagrams, aggregate.Aggregation sums them up. Needs the extra: pip install 'fastrecv[flow]'.
Nothing is imported here: the command must have no thread, and pyarrow starts some.
"""
