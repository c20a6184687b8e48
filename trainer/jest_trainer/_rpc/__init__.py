"""Private: the calls to the server, and messages to values and back."""
