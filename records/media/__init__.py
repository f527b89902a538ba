"""Images and sounds with questions and answers: read, checked, and some that are made here."""
