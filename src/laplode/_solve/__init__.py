"""How solutions depend on parameters: replay of accepted steps, sensitivities, second derivatives."""
