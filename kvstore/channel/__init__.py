"""The same-host channel: binary records over a unix socket, which also hands over the memory."""
