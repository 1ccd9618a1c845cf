"""The init service: initial weights of registered models, over gRPC.

A training job names a model and gets back an init program of a few hundred kilobytes;
the job's own accelerators make the weights, and the service allocates none. It computes
windows of them for a client that asks for values rather than a program
(``StreamShards``), and for a checkpoint that it is to write (``WriteCheckpoint``).

``client`` is all that a job needs; it imports neither JAX nor Flax until it is asked
to initialise. ``server`` is the other side. ``wire`` belongs to neither: it turns
Python objects into messages and back, and says what a request may cost before anything
is done for it. What a program file holds, ``core.program`` reads and writes.
"""
