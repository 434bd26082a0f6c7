import MLX

/// xIELU of `x`, of any shape, computed in float32 whatever the type of `x`, and returned in it.
///
/// x > 0: `alphaP x^2 + beta x`; else `alphaN (expm1(min(x, eps)) - x) + beta x`. With the slopes
/// of trained models (up to 170) 16-bit arithmetic loses a fifth of the negative branch.
///
/// - Parameters: the final slopes, see `slopes(alphaP:alphaN:beta:eps:)`.
public func xielu(
    _ x: MLXArray, alphaP: MLXArray, alphaN: MLXArray, beta: MLXArray, eps: MLXArray
) -> MLXArray {
    let y = x.asType(.float32)
    let positive = alphaP * square(y)
    let negative = alphaN * (expm1(minimum(y, eps)) - y)
    return (which(y .> Float(0), positive, negative) + beta * y).asType(x.dtype)
}

/// xIELU of one layer, with the slopes that its equation has.
public struct XIELU {
    let alphaP, alphaN, beta, eps: MLXArray

    /// From what a checkpoint stores: alphas before softplus, of shape `[1]` or `[]`.
    public init(alphaP: MLXArray, alphaN: MLXArray, beta: MLXArray, eps: MLXArray) {
        func float(_ array: MLXArray) -> MLXArray { array.reshaped([]).asType(.float32) }
        self.beta = float(beta)
        self.eps = float(eps)
        self.alphaP = logAddExp(float(alphaP), Float(0))
        self.alphaN = self.beta + logAddExp(float(alphaN), Float(0))
    }

    /// Compute the slopes now, once for all calls.
    func evaluated() -> XIELU {
        eval(alphaP, alphaN, beta, eps)
        return self
    }

    /// xIELU of `x`, of any shape.
    public func callAsFunction(_ x: MLXArray) -> MLXArray {
        xielu(x, alphaP: alphaP, alphaN: alphaN, beta: beta, eps: eps)
    }
}
