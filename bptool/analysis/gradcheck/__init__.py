"""Is my gradient right, and if not, which parameter and which op?"""
