"""Entry point of the command."""


def main() -> int:
    """Run the command."""
    return 0
