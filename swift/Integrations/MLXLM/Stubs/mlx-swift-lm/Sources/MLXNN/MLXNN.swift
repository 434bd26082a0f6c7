// A stub: see Package.swift.
import MLX

open class Module {
    public init() {}
}

public protocol UnaryLayer: Module { func callAsFunction(_ x: MLXArray) -> MLXArray }
public protocol OffsetLayer: Module { func callAsFunction(_ x: MLXArray, offset: Int) -> MLXArray }
public protocol ArrayOffsetLayer: Module {
    func callAsFunction(_ x: MLXArray, offset: MLXArray) -> MLXArray
}

@propertyWrapper public final class ModuleInfo<T> {
    public var wrappedValue: T { get { fatalError() } set { fatalError() } }
    public init(wrappedValue: T, key: String? = nil) {}
    public init(key: String? = nil) {}
}

@propertyWrapper public final class ParameterInfo<T> {
    public var wrappedValue: T { get { fatalError() } set { fatalError() } }
    public init(wrappedValue: T, key: String? = nil) {}
    public init(key: String? = nil) {}
}

open class Linear: Module, UnaryLayer {
    public init(_ inputDimensions: Int, _ outputDimensions: Int, bias: Bool = true) {}
    open func callAsFunction(_ x: MLXArray) -> MLXArray { fatalError() }
}

open class Embedding: Module, UnaryLayer {
    public init(embeddingCount: Int, dimensions: Int) {}
    open func callAsFunction(_ x: MLXArray) -> MLXArray { fatalError() }
    open func asLinear(_ x: MLXArray) -> MLXArray { fatalError() }
}

open class RMSNorm: Module, UnaryLayer {
    public init(dimensions: Int, eps: Float = 1e-5) {}
    open func callAsFunction(_ x: MLXArray) -> MLXArray { fatalError() }
}
