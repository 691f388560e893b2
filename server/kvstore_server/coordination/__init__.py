"""Ways in which a cluster agrees on its members: a list that is given, or etcd."""
