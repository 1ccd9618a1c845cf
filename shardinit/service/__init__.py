"""The init service: initial weights of registered models, over gRPC.

A training job names a model and gets back an init program of a few hundred kilobytes;
the job's own accelerators make the weights. The service never allocates a parameter.

``client`` is all that a job needs; it imports neither JAX nor Flax until it is asked
to initialise. ``server`` is the other side. ``wire`` belongs to neither: it is the only
place where messages and Python objects meet, and says what a request may cost before
anything is done for it.
"""
