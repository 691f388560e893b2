"""Version 1 of the public protocol: kvstore.proto, the code generated from it, and translations."""
