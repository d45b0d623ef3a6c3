"""What libraries ask of the user's account, where there is none: in a container with ``docker run -u 12345``."""

from __future__ import annotations

import getpass
import os


def name_user() -> None:
    """Give this process, and those that it starts, a user name if it has none; else change nothing.

    MONAI asks for the name when it is imported and ends with `KeyError: getpwuid()` where neither the environment nor
    the list of users has one. Python looks into the environment first, so a name there is all that it takes.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 has made an OSError of it
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
