"""``python -m softshare`` is the command ``softshare``."""

from .cli import main

raise SystemExit(main())
