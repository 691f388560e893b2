"""Where blocks live: pools and the bookkeeping of their space."""
