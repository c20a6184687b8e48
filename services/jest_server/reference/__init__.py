"""The reference model as files and configuration: what Triton serves, what adapters may expect, and how it is made."""
