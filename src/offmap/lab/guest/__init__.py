"""What runs inside the disposable host: standard library only, and little of it, as every import is slow there."""
