"""The init function as a graph: no other room looks into a jaxpr."""
