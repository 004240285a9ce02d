"""The machine: its rates, and the policy that suits them."""
