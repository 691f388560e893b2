"""Moving bytes between two processes' memories: one Protocol, several ways."""
