"""Every sentence of the report in Spanish, Portuguese and English.

A page holds all three; a switch shows one. Keys are checked by a test: none may lack a language.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Lang = Literal["es", "pt", "en"]
LANGS: Final[tuple[Lang, ...]] = ("es", "pt", "en")
NAMES: Final = {"es": "Español", "pt": "Português", "en": "English"}


class Words(NamedTuple):
    """One sentence, three times. ``{…}`` are filled in."""

    es: str
    pt: str
    en: str

    def of(self, **values: object) -> Words:
        """The same with its gaps filled."""
        return Words(*(text.format(**values) for text in self))


W: Final[dict[str, Words]] = {
    "title": Words(
        "Informe de auditoría del entrenamiento",
        "Relatório de auditoria do treinamento",
        "Audit report of the training",
    ),
    "subtitle": Words(
        "Federación {federation} · registro {origin}",
        "Federação {federation} · registro {origin}",
        "Federation {federation} · log {origin}",
    ),
    "holds": Words(
        "El registro es íntegro.",
        "O registro está íntegro.",
        "The log holds.",
    ),
    "holds_more": Words(
        "Se verificaron los {leaves} asientos: cada firma, cada cadena y cada prueba. No se"
        " encontró ninguna alteración.",
        "Os {leaves} lançamentos foram verificados: cada assinatura, cada cadeia e cada prova."
        " Nenhuma alteração foi encontrada.",
        "All {leaves} records were verified: every signature, every chain and every proof. No"
        " alteration was found.",
    ),
    "bad": Words(
        "El registro NO es íntegro.",
        "O registro NÃO está íntegro.",
        "The log does NOT hold.",
    ),
    "bad_more": Words(
        "Primer lugar en que falla: {place}. Todo lo posterior a ese punto no se da por bueno."
        " Conserve esta copia: es la evidencia.",
        "Primeiro lugar em que falha: {place}. Nada do que vem depois é dado por bom. Guarde esta"
        " cópia: ela é a evidência.",
        "First place where it fails: {place}. Nothing after that point is taken as good. Keep this"
        " copy: it is the evidence.",
    ),
    "failing": Words(
        "El registro es íntegro, pero {count} respuestas son negativas.",
        "O registro está íntegro, mas {count} respostas são negativas.",
        "The log holds, but {count} answers are negative.",
    ),
    "failing_more": Words(
        "Lo que el registro dice quedó tal como se firmó; lo que dice incumple una regla. Vea los"
        " hallazgos.",
        "O que o registro diz está como foi assinado; o que ele diz descumpre uma regra. Veja os"
        " achados.",
        "What the log says is as it was signed; what it says breaks a rule. See the findings.",
    ),
    "unanchored": Words(
        "Sin ancla: las claves del registro y de los testigos se tomaron del mismo lugar que el"
        " registro. Quien falsifique ambos no sería descubierto por este informe.",
        "Sem âncora: as chaves do registro e das testemunhas vieram do mesmo lugar que o registro."
        " Quem falsificasse ambos não seria descoberto por este relatório.",
        "Unanchored: the keys of log and witnesses were taken from the same place as the log. Who"
        " forged both would not be found out by this report.",
    ),
    "unknown_note": Words(
        "{count} preguntas no pudieron responderse del todo con lo que había a mano. Eso no es una"
        " aprobación.",
        "{count} perguntas não puderam ser respondidas por completo com o que havia à mão. Isso não"
        " é uma aprovação.",
        "{count} questions could not be answered in full with what was at hand. That is no"
        " approval.",
    ),
    "witnessed": Words(
        "Último cierre con quórum de testigos: {when} (UTC).",
        "Último fechamento com quórum de testemunhas: {when} (UTC).",
        "Last head with a quorum of witnesses: {when} (UTC).",
    ),
    "institutions": Words("instituciones", "instituições", "institutions"),
    "countries": Words("países", "países", "countries"),
    "rounds_released": Words(
        "rondas terminadas de {all}", "rodadas concluídas de {all}", "rounds released of {all}"
    ),
    "findings_count": Words("hallazgos", "achados", "findings"),
    "h_who": Words("Quién participó", "Quem participou", "Who took part"),
    "p_who": Words(
        "Cada columna es una ronda; cada fila, una institución. Participar significa que su aporte"
        " está en la suma que dio el modelo siguiente.",
        "Cada coluna é uma rodada; cada linha, uma instituição. Participar significa que sua"
        " contribuição está na soma que deu o modelo seguinte.",
        "Each column is a round, each row an institution. Taking part means that its contribution"
        " is in the sum that gave the next model.",
    ),
    "in_sum": Words("en la suma", "na soma", "in the sum"),
    "dropped": Words("se perdió", "perdeu-se", "lost on the way"),
    "declined": Words("rehusó", "recusou", "declined"),
    "joined_only": Words(
        "aceptó; la ronda no terminó", "aceitou; a rodada não terminou", "joined; nothing came out"
    ),
    "silent": Words("sin respuesta", "sem resposta", "no answer"),
    "country": Words("país", "país", "country"),
    "institution": Words("institución", "instituição", "institution"),
    "round": Words("ronda", "rodada", "round"),
    "h_country": Words(
        "Participación por país", "Participação por país", "Taking part, by country"
    ),
    "times_in_sum": Words("aportes en sumas", "contribuições em somas", "contributions in sums"),
    "h_learning": Words("Qué se aprendió", "O que se aprendeu", "What was learned"),
    "p_learning": Words(
        "Bits por byte en textos que ninguna institución usó para entrenar: menos es mejor. Ninguna"
        " cifra es de una sola institución; todas son sumas.",
        "Bits por byte em textos que nenhuma instituição usou para treinar: menos é melhor. Nenhum"
        " número é de uma só instituição; todos são somas.",
        "Bits per byte on text that no institution trained on: less is better. No figure is that of"
        " one institution; all are sums.",
    ),
    "p_loss": Words(
        "Pérdida de entrenamiento por ronda (nats por token), sumada sobre las instituciones.",
        "Perda de treinamento por rodada (nats por token), somada sobre as instituições.",
        "Training loss per round (nats per token), summed over the institutions.",
    ),
    "no_curves": Words(
        "No hay curvas: las sumas publicadas no estaban a mano (--blobs).",
        "Não há curvas: as somas publicadas não estavam à mão (--blobs).",
        "There are no curves: the published sums were not at hand (--blobs).",
    ),
    "all_languages": Words("todos los idiomas", "todos os idiomas", "all languages"),
    "training_loss": Words("pérdida", "perda", "loss"),
    "h_privacy": Words("Privacidad gastada", "Privacidade gasta", "Privacy spent"),
    "p_privacy": Words(
        "Épsilon mide cuánto puede saberse, como máximo, de un texto por haberlo usado: menos es"
        " mejor. Se recalculó de lo que cada institución firmó.",
        "Épsilon mede quanto, no máximo, se pode saber de um texto por tê-lo usado: menos é melhor."
        " Foi recalculado do que cada instituição assinou.",
        "Epsilon measures how much at most can be learned about one text from its having been used:"
        " less is better. It was computed again from what each institution signed.",
    ),
    "no_privacy": Words(
        "Los planes de este registro no prometen privacidad diferencial (modo {modes}). Una suma"
        " puede delatar algo de lo que contiene.",
        "Os planos deste registro não prometem privacidade diferencial (modo {modes}). Uma soma"
        " pode revelar algo do que contém.",
        "The plans of this log promise no differential privacy (mode {modes}). A sum can betray"
        " something of what is in it.",
    ),
    "privacy_unknown": Words(
        "Hay gastos de privacidad, pero no se recalcularon: {why}",
        "Há gastos de privacidade, mas não foram recalculados: {why}",
        "Privacy was spent, but it was not computed again: {why}",
    ),
    "dataset": Words("conjunto", "conjunto", "data set"),
    "unit": Words("unidad", "unidade", "unit"),
    "updates": Words("aportes", "contribuições", "updates"),
    "budget": Words("presupuesto", "orçamento", "budget"),
    "h_troubles": Words(
        "Rondas que no terminaron, ausencias y rechazos",
        "Rodadas que não terminaram, ausências e recusas",
        "Rounds without a result, dropouts and refusals",
    ),
    "none": Words("Ninguno.", "Nenhum.", "None."),
    "aborted": Words("abortada", "abortada", "aborted"),
    "burned": Words(
        "quemada (cuenta como gastada)", "queimada (conta como gasta)", "burned (counts as spent)"
    ),
    "what": Words("qué", "o quê", "what"),
    "detail": Words("detalle", "detalhe", "detail"),
    "record": Words("asiento", "lançamento", "record"),
    "h_overrides": Words(
        "Excepciones y objeciones", "Exceções e objeções", "Overrides and objections"
    ),
    "override": Words("excepción a una regla", "exceção a uma regra", "override of a rule"),
    "objection": Words("objeción", "objeção", "objection"),
    "open_objection": Words("sin resolver", "sem resolução", "not resolved"),
    "dismissed": Words("desestimada", "rejeitada", "dismissed"),
    "upheld": Words("acogida", "acolhida", "upheld"),
    "h_findings": Words("Hallazgos", "Achados", "Findings"),
    "p_findings": Words(
        "Lo que falla, primero; después lo que no se pudo comprobar. El detalle técnico está en"
        " inglés, como en el registro.",
        "Primeiro o que falha; depois o que não pôde ser verificado. O detalhe técnico está em"
        " inglês, como no registro.",
        "What fails first; then what could not be checked.",
    ),
    "no_findings": Words("Nada falla.", "Nada falha.", "Nothing fails."),
    "h_questions": Words("Las 22 preguntas", "As 22 perguntas", "The 22 questions"),
    "yes": Words("comprobado", "verificado", "shown"),
    "no": Words("FALLA", "FALHA", "FAILS"),
    "open": Words("no se sabe", "não se sabe", "not known"),
    "h_not": Words(
        "Lo que la criptografía no muestra",
        "O que a criptografia não mostra",
        "What cryptography does not show",
    ),
    "h_check": Words("Compruébelo usted mismo", "Verifique você mesmo", "Check it yourself"),
    "p_check": Words(
        "Este informe no pide confianza. Con una copia del registro y el programa libre Minga,"
        " cualquiera repite cada paso sin conexión:",
        "Este relatório não pede confiança. Com uma cópia do registro e o programa livre Minga,"
        " qualquer pessoa repete cada passo sem conexão:",
        "This report asks for no trust. With a copy of the log and the free program Minga anybody"
        " repeats every step offline:",
    ),
    "recomputed": Words(
        "Modelos vueltos a calcular desde los aportes enmascarados: {good} de {all}.",
        "Modelos recalculados a partir das contribuições mascaradas: {good} de {all}.",
        "Models made again from the masked contributions: {good} of {all}.",
    ),
    "resources": Words(
        "Recursos declarados por las instituciones (son declaraciones, no pruebas): {gpu} horas de"
        " GPU, {energy} kWh, {data} MB enviados.",
        "Recursos declarados pelas instituições (são declarações, não provas): {gpu} horas de GPU,"
        " {energy} kWh, {data} MB enviados.",
        "Resources that the institutions claim (claims, not proofs): {gpu} GPU hours, {energy} kWh,"
        " {data} MB sent.",
    ),
}

QUESTION: Final[dict[str, Words]] = {
    "1": Words("¿Quién participó?", "Quem participou?", "Who took part?"),
    "2": Words(
        "¿Qué política regía, y quién la firmó?",
        "Que política valia, e quem a assinou?",
        "Which policy, signed by whom?",
    ),
    "3": Words("¿Estaba vigente?", "Estava em vigor?", "Was it in force?"),
    "4": Words(
        "¿Cuánta privacidad perdió cada institución?",
        "Quanta privacidade cada instituição perdeu?",
        "What privacy did each institution lose?",
    ),
    "5": Words(
        "¿Qué modelo entró y cuál salió?",
        "Que modelo entrou e qual saiu?",
        "Which model went in and out?",
    ),
    "6": Words(
        "¿Qué código se ejecutó?", "Que código foi executado?", "Which code and container ran?"
    ),
    "7": Words(
        "¿Qué datos se declararon?", "Que dados foram declarados?", "Which data was declared?"
    ),
    "8": Words(
        "¿Qué se abortó o quemó, por qué y por quién?",
        "O que foi abortado ou queimado, por quê e por quem?",
        "What was aborted or burned, why, by whom?",
    ),
    "9": Words(
        "¿Quién faltó o rehusó, y por qué?",
        "Quem faltou ou recusou, e por quê?",
        "Who dropped or refused, why?",
    ),
    "10": Words(
        "¿El mismo plan y modelo para todos?",
        "O mesmo plano e modelo para todos?",
        "Was it the same plan and model for all?",
    ),
    "11": Words(
        "¿Hubo excepciones a las reglas?", "Houve exceções às regras?", "Were rules overridden?"
    ),
    "12": Words(
        "¿Se usó de verdad la suma segura?",
        "A soma segura foi mesmo usada?",
        "Was secure aggregation really used?",
    ),
    "13": Words(
        "¿Se respetaron los límites de norma?",
        "Os limites de norma foram respeitados?",
        "Were norm bounds respected?",
    ),
    "14": Words(
        "¿Dominó alguna institución?",
        "Alguma instituição dominou?",
        "Did one institution dominate?",
    ),
    "15": Words(
        "¿Actuó un miembro suspendido?",
        "Um membro suspenso atuou?",
        "Was a suspended member active?",
    ),
    "16": Words(
        "¿Cada certificado tiene su origen?",
        "Cada certificado tem sua origem?",
        "Is every certificate accounted for?",
    ),
    "17": Words(
        "¿Se reescribió el registro, o tuvo dos caras?",
        "O registro foi reescrito, ou teve duas caras?",
        "Was the log rewritten or two-faced?",
    ),
    "18": Words("¿Hay vacíos en el tiempo?", "Há lacunas no tempo?", "Are there gaps in time?"),
    "19": Words(
        "¿Quién aprobó publicar un modelo, y con qué pruebas?",
        "Quem aprovou publicar um modelo, e com que provas?",
        "Who approved a release, on what?",
    ),
    "20": Words("¿Qué recursos costó?", "Que recursos custou?", "What did it cost in resources?"),
    "21": Words("¿Qué no se ejecutó?", "O que não foi executado?", "What did not run?"),
    "22": Words(
        "¿Qué pasó con las objeciones?",
        "O que houve com as objeções?",
        "What became of objections?",
    ),
}

# In the order of ``policies.audit.verify.NOT_SHOWN``.
NOT_SHOWN: Final = (
    Words(
        "que una institución entrenó con los datos que declaró y con el código que recibió",
        "que uma instituição treinou com os dados que declarou e com o código que recebeu",
        "that a node trained on the data it declared, with the code it was sent",
    ),
    Words(
        "que una institución añadió el ruido y recortó los textos como dice su declaración",
        "que uma instituição somou o ruído e recortou os textos como diz sua declaração",
        "that a node drew the noise and clipped the records that its privacy claim says",
    ),
    Words(
        "que las cifras de energía, tiempo y dinero son ciertas: son declaraciones firmadas",
        "que os números de energia, tempo e dinheiro são certos: são declarações assinadas",
        "that the figures for energy, time and money are right: they are signed claims",
    ),
    Words(
        "que algo se borró cuando se dijo que se borraba",
        "que algo foi apagado quando se disse que seria",
        "that anything was deleted when it was said to be",
    ),
    Words(
        "que los testigos son independientes entre sí y de quien opera",
        "que as testemunhas são independentes entre si e de quem opera",
        "that the witnesses are independent of each other and of the operator",
    ),
    Words(
        "que nada ocurrió después del último cierre de esta copia",
        "que nada ocorreu depois do último fechamento desta cópia",
        "that nothing happened after the last checkpoint of this copy",
    ),
    Words(
        "que los datos tienen la licencia que se dice, o que no son datos personales",
        "que os dados têm a licença que se diz, ou que não são dados pessoais",
        "that an institution's data is what its licence says, or is not personal data",
    ),
    Words(
        "que una suma de muchas instituciones no delata nada de una: eso solo lo limita el ruido",
        "que uma soma de muitas instituições não revela nada de uma: só o ruído limita isso",
        "that a sum over many institutions gives nothing of one of them away: only noise limits"
        " that",
    ),
)
