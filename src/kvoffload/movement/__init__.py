"""Moving bytes between callers and tiers, and between tiers.

`transfer` copies, reads and writes; `storing`, `loading` and `durability` decide with the index
what to transfer, and publish the outcome there.
"""
