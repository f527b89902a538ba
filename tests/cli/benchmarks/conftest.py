from policy import policy_path  # noqa: F401
