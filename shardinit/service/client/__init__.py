"""The client of the init service."""

from shardinit.extras import needs

with needs("grpc", "shardinit[service]"):
    import grpc as grpc
