"""Front ends: each turns one framework's way of building a model into an `InitFn`.

A front end answers three questions and no more: which pure function of a key gives
the arrays, what the dimensions of each array are called, and how the framework's own
object is made of the arrays again. Every framework is optional and lives behind one
module of this package, which nothing else imports; the modules do not know each other.
"""
