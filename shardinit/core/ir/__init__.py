"""The init function as a graph: the only room that reads jaxprs."""
