import ApertusCore
import ApertusMLX

/// How a model is loaded; what is nil is chosen so that it fits the memory there is.
public struct LoadOptions: Sendable {
    /// In which type activations are computed, and weights that are not quantized.
    public enum ComputeType: String, Sendable, CaseIterable {
        case bfloat16, float16, float32

        /// Of a number.
        package var byteCount: Int { self == .float32 ? 4 : 2 }
    }

    /// Tokens of prompt and answer together for which memory must suffice, at most the model's own
    /// context. A conversation cannot become longer than this.
    public var context = 8192
    /// How keys and values are kept.
    public var cacheForm: CacheForm?
    /// Tokens of a prompt that are computed at a time. Nil tries 128 first on iPhone and iPad, 512
    /// elsewhere.
    public var prefillStep: Int?
    /// Most bytes that the model may take; nil stands for what the device can give just now.
    public var memoryLimit: Int?
    /// Whether to load even where the plan says that memory will not suffice.
    public var ignoresMemoryLimit = false
    /// Nil stands for bfloat16 where the weights are stored so and a GPU computes, else float32.
    public var computeType: ComputeType?
    /// The form of the chat template, `v1`, `v1.1` or `v1-first`; nil stands for what the folder's manifest
    /// says.
    public var chatTemplate: String?

    /// What suits the device.
    public init() {}
}
