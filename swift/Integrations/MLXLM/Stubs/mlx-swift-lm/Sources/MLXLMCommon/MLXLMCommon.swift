// A stub: see Package.swift.
import Foundation
import MLX
import MLXNN

public protocol Tokenizer: Sendable {
    func encode(text: String, addSpecialTokens: Bool) -> [Int]
    func decode(tokenIds: [Int], skipSpecialTokens: Bool) -> String
    func convertTokenToId(_ token: String) -> Int?
    func convertIdToToken(_ id: Int) -> String?
    var bosToken: String? { get }
    var eosToken: String? { get }
    var unknownToken: String? { get }
    func applyChatTemplate(
        messages: [[String: any Sendable]], tools: [[String: any Sendable]]?,
        additionalContext: [String: any Sendable]?
    ) throws -> [Int]
}

public protocol TokenizerLoader: Sendable {
    func load(from directory: URL) async throws -> any Tokenizer
}

public enum RoPEOffset {
    case scalar(Int)
    case batch(MLXArray)
}

public protocol KVCache {
    var offset: Int { get }
    var ropeOffset: RoPEOffset { get }
}

public typealias RoPELayer = OffsetLayer & ArrayOffsetLayer

public func applyRotaryPosition<R: RoPELayer>(
    _ rope: R, to x: MLXArray, offset: RoPEOffset?
) -> MLXArray { fatalError() }

public func attentionWithCacheUpdate(
    queries: MLXArray, keys: MLXArray, values: MLXArray, cache: KVCache?, scale: Float,
    mask: MLXFast.ScaledDotProductAttentionMaskMode = .none
) -> MLXArray { fatalError() }

public func createAttentionMask(
    h: MLXArray, cache: KVCache?, windowSize: Int? = nil, returnArray: Bool = false
) -> MLXFast.ScaledDotProductAttentionMaskMode { fatalError() }

public protocol BaseLanguageModel: Module {
    func sanitize(weights: [String: MLXArray]) -> [String: MLXArray]
}

public protocol LanguageModel: BaseLanguageModel {
    func callAsFunction(_ inputs: MLXArray, cache: [KVCache]?) -> MLXArray
}

public protocol LoRAModel { var loraLayers: [Module] { get } }
public protocol KVCacheDimensionProvider { var kvHeads: [Int] { get } }

public actor ModelTypeRegistry<T> {
    public init() {}
    public func registerModelType(_ type: String, creator: @escaping (Data) throws -> T) {
        fatalError()
    }
}
