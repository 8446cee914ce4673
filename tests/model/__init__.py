"""The protocol on a small world, explored exhaustively; see README.md."""
