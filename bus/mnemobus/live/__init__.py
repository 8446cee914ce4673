"""What is hot is kept current from the log: windows of scopes that are held live, and their channels."""
