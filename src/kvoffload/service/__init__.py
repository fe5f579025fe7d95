"""kvoffload as an HTTP service: endpoints, access control, sessions, metrics, settings.

Needs `pip install 'kvoffload[server]'`. `kvoffload serve` runs it by itself;
`kvoffload.integrations.fastapi` puts it into an application of your own.
"""

from importlib.metadata import version

VERSION = version("kvoffload")
"""Read once, for it is read from a file."""
