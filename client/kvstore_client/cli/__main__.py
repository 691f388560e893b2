"""`python -m kvstore_client.cli`: the `kvstore` command where scripts are not on the path."""

import sys

from kvstore_client.cli import main

sys.exit(main())
