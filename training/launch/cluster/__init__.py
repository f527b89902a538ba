"""What a large training needs before anybody pays for it: memory, traffic, time, failures and the layout that fits.

`deepseek-moe plan` prints it. Everything here is arithmetic over a model's shapes; nothing runs on a GPU.
"""
