from tiny_models import input_ids, stock, tiny  # noqa: F401
