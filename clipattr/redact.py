"""What must not be seen: nothing that is shown, logged or saved has a password in it."""

import re


def hide_secrets(text: str) -> str:
    """The text, its URLs without user:password and, of http, without the query.

    A signed URL is a password for a file: it is needed for requests, and shown nowhere.
    """
    text = re.sub(r"(\w://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(?i)(https?://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)
