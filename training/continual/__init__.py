"""Learning on: replay, merging of weights, the gate, and which model is in force."""
