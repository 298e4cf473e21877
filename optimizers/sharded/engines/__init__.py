"""How each engine cuts its parameters: a module per engine reads the layout."""
