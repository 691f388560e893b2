"""How nodes and clients of a cluster reach each other over gRPC.

One service with two methods, whose messages are the frames of `kvstore.cluster.messages`: `Call`, a
question and its answer, and `Attach`, a stream that carries a session and lives as long as it.
"""
