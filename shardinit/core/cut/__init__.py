"""One init function into the few leaf programs that it is made of."""
