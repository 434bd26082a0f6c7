// A stub: see Package.swift.
import MLXLMCommon

public protocol LLMModel: LanguageModel, LoRAModel {}

public enum LLMTypeRegistry {
    public static let shared = ModelTypeRegistry<any LanguageModel>()
}
