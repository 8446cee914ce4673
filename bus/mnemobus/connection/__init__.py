"""Connections to Redis: their handshake, their transport, and what a server's errors mean."""
