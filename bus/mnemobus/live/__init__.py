"""Live scopes: the log keeps windows of hot scopes current, through channels."""
