import CMLXShim

public func eval(_ arrays: some Collection<MLXArray>) { evaluate(arrays, async: false) }
public func eval(_ arrays: MLXArray...) { evaluate(arrays, async: false) }
public func asyncEval(_ arrays: some Collection<MLXArray>) { evaluate(arrays, async: true) }

private func evaluate(_ arrays: some Collection<MLXArray>, async: Bool) {
    if mx_eval(arrays.map { $0.raw as mx_array? }, Int32(arrays.count), async) != 0 {
        reportError()
    }
}

public final class Stream: @unchecked Sendable {
    public init() {}
    public func synchronize() { if mx_synchronize() != 0 { reportError() } }
}
