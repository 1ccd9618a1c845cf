"""What lies where on a mesh, and what that takes."""
