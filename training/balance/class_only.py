"""A class method that refuses to be called on an instance.

`ExpertBalanceCallback(0.001).attach(trainer)` reads well, and with a plain class method attaches a second callback
without the 0.001.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    ClassOnly = classmethod
else:

    class ClassOnly(classmethod):
        """A class method of which an instance, whose settings it would drop without a word, is refused.

        Raises:
            TypeError: It is called on an instance.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Return the method bound to its class."""
            if instance is not None:
                whole = f"{type(instance).__name__}.{self.__func__.__name__}"
                raise TypeError(f"{whole}: got an instance, expected {whole}(trainer, ...) with the settings")
            return super().__get__(instance, owner)
