"""Find the activation at the end of a model, and compare it with the one in the loss.

An activation is one operator, or several that compute the same together.  If the loss applies it
too, the loss skips it.  The losses and their formulas are in ``differentiation/``.  Modules in this
package may import ``graphs``.
"""
