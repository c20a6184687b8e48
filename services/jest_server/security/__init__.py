"""Who may speak to this server, and over what: bearer tokens, tenants, TLS."""
