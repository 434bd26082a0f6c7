import ApertusCore
import ApertusMLX
import Foundation

/// What a model's folder holds but the weights: enough to make prompts and to plan memory.
package struct ModelFolder: Sendable {
    package let url: URL
    package let config: ModelConfig
    package let manifest: Manifest?
    package let generationConfig: GenerationConfig
    package let tokenizer: Tokenizer
    /// Ids that end an answer; the end of the assistant's turn and of its calls always do.
    package let stopIDs: Set<Int32>
    let roles: Roles
    private let template: String?

    /// Read the small files of `url`; no weights are opened.
    ///
    /// - Throws: `ApertusError` that names file and key.
    package init(_ url: URL, chatTemplate: String? = nil) throws {
        try Self.requireDevice()
        self.url = url
        config = try ModelConfig(folder: url)
        manifest = try Manifest(folder: url)
        try manifest?.check(config)
        generationConfig = try GenerationConfig(folder: url, vocabSize: config.vocabSize)
        tokenizer = try Tokenizer(folder: url)
        roles = try Roles(tokenizer)
        template = chatTemplate ?? manifest?.chatTemplate
        let stated =
            generationConfig.eosTokenIds.isEmpty
            ? config.eosTokenIds : generationConfig.eosTokenIds
        stopIDs = Set(stated + [Role.assistant.end, Role.tools.end])
    }

    private static func requireDevice() throws {
        #if targetEnvironment(simulator)
            throw ApertusError(
                .resource,
                "MLX does not run in the simulator; run on a device, or on a Mac as "
                    + "\"Designed for iPad\""
            )
        #endif
    }

    /// The format in which conversations of today are written for the model.
    ///
    /// - Throws: `ApertusError` of kind `rejected`: nobody says what it is, or it is of a form that
    ///   this package does not write.
    package func chatFormat(day: String = ChatFormat.today()) throws -> ChatFormat {
        guard let template else {
            throw ApertusError(
                .rejected,
                "\(url.filePath): no manifest says of which form the chat template is; convert the "
                    + "model with apertus-mlx, or give LoadOptions.chatTemplate")
        }
        return try ChatFormat(
            template, system: manifest?.defaultSystem, day: day, tokenizer: tokenizer,
            bos: config.bosTokenId)
    }

    /// The prompt that `text` is without a chat template: BOS, if the model has one, and the text.
    package func rawPrompt(_ text: String) -> [Int32] {
        (config.bosTokenId.map { [$0] } ?? []) + tokenizer.encode(text)
    }

    /// How the model is run with `options`, if memory allows it.
    ///
    /// With a manifest that says what the weights take, no weights are opened for it.
    ///
    /// - Throws: `ApertusError` of kind `resource`: how much is missing, and what would fit.
    package func plan(_ options: LoadOptions) throws -> MemoryPlan {
        guard options.context > 0 else {
            throw ApertusError(.usage, "a context of \(options.context) tokens: expected 1 or more")
        }
        let terms =
            try manifest?.memory ?? MemoryTerms(Checkpoint(folder: url), on: DeviceMemory.machine)
        let planner = MemoryPlanner(config, terms)
        let context = min(options.context, config.maxPositions)
        let limit = options.memoryLimit ?? DeviceMemory.available
        if options.ignoresMemoryLimit {
            let (form, step) = (options.cacheForm ?? .full, options.prefillStep ?? Self.usualStep)
            let needed = planner.footprint(form, context: context, prefillStep: step).totalBytes
            return try planner.plan(
                limitBytes: max(limit, needed), context: context, form: form, prefillStep: step)
        }
        // The usual step, where it fits with the best cache; else the planner weighs both.
        if options.prefillStep == nil,
            let usual = try? planner.plan(
                limitBytes: limit, context: context, form: options.cacheForm ?? .full,
                prefillStep: Self.usualStep)
        {
            return usual
        }
        return try planner.plan(
            limitBytes: limit, context: context, form: options.cacheForm,
            prefillStep: options.prefillStep)
    }

    #if os(iOS) || os(visionOS)
        // Longer ones bring a phone's GPU little, and take memory.
        private static let usualStep = 128
    #else
        private static let usualStep = 512
    #endif
}
