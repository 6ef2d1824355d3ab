"""A server over HTTP that turns to cheaper operating points under load before it refuses requests (docs/serve.md)."""
