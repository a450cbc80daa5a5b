"""The HTTP server without its handlers: the fields of the API, the service, connections, metrics, the page."""
